"""What every service process is made of: settings, logs, the gRPC face, the store of loaded versions, start and stop."""
