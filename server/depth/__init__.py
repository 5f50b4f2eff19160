"""The depth of a request: levels, the policy in force, automatic depth."""
