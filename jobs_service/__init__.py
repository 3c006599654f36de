"""The jobs service: durable asynchronous inference. Stores jobs and works them off through the proxy."""
