"""Run the demo: train EFFT2 and a linear probe on two small tasks, then save, reload, merge and check the adapter."""
