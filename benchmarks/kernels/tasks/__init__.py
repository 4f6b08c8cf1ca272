"""What is timed, one file an op: ``tasks(quick)`` of each gives its shapes and implementations."""
