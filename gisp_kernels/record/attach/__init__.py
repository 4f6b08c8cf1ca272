"""How recording meets a module: in the forward of a Linear, or at the gradient of a weight."""
