"""The network: its operations, its channels, and which of their scales are free."""
