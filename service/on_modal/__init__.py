"""The worker inside a Modal class: started and drained by its hooks, fed with lists, and the doors to it."""
