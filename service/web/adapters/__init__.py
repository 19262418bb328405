"""What clients of other servers speak: routes in the shapes of theirs, over the same models."""
