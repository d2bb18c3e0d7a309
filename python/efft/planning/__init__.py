"""Plan which weights of a model are adapted and which of them share factors. No function changes the model."""
