"""Formats of exports, one a module; ``FORMATS`` of :mod:`gisp.export.sizes.options` names them."""
