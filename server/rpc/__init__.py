"""The gRPC face of the service."""

import os

# gRPC reads it when it is imported; without it, every port scan is reported on stderr.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
