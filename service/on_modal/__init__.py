"""The worker inside a Modal class, Modal as an engine of calls, and the HTTP services over both."""
