"""The jobs service: durable asynchronous inference. Stores jobs and runs them through the proxy."""
