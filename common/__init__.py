"""What server, client and simulations share; knows nothing of them, nor of Flower."""
