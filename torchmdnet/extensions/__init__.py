"""Established addresses of low-level functions; the package itself does not use them."""
