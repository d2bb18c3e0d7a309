"""Plan which weights of a model are adapted and which of them share a tensor train. No function changes the model."""
