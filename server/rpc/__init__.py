"""gRPC: servicers, messages, status codes and the client."""

import os

# gRPC reads this when it is imported. By default it reports every port scan on stderr.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
