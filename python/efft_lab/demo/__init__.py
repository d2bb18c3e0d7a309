"""Run the demo: train EFFT and a linear probe on two small tasks, then save, reload, merge and check the adapter."""
