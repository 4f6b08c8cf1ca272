"""Forward and backward passes through layers, in place of single ops."""
