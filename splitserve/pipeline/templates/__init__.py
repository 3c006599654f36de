"""Pipelines to copy: ``splitserve pipeline new DIR --template NAME``. Nothing imports them but the copies' owners."""
