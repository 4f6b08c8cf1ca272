"""Formats of exports, one a module; ``FORMATS`` of :mod:`gisp.export.options` names them."""
