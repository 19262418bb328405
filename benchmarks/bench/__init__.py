"""``modalkit bench``: measures a server, a container, a worker or a class of Modal's, and shows what it measured."""
