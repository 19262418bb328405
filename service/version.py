"""The version of modalkit, for the build and for places that have the sources only, such as a container."""

VERSION = "0.1.0"
