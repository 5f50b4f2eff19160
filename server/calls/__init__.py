"""Calls as plain data: requests, answers, callers and records, apart from the transport."""
