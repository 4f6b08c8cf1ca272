"""Models larger than one GPU: decoder layers lie in host memory and visit the device one after the other."""
