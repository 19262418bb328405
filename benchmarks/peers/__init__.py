"""The bundled model behind other servers, measured in turn with modalkit: ``python -m modalkit.benchmarks.peers``."""
