"""The text that makes a batch fail, where importing it must not load torch."""

POISON = "This text makes its batch fail."
