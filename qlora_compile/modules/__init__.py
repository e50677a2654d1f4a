"""nn.Modules that hold packed weights."""
