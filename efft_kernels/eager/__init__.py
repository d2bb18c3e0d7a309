"""Hand-written forward and backward on the vendor's matrix products: works on any device, needs no compiler."""
