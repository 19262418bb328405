"""The bundled sentiment pipeline behind each server, started with `modalkit.benchmarks.peers.settings.Settings`."""
