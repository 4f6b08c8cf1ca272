"""Recording around an ordinary ``loss.backward()``: importance of structures, statistics of activations."""
