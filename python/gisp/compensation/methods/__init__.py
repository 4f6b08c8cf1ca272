"""Methods of a compensation, one idea a file; ``METHODS`` of :mod:`gisp.compensation.options` names them."""
