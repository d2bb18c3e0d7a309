"""The demo: EFFT2 beside a linear probe on two small tasks, saved, reloaded elsewhere, merged and checked."""
