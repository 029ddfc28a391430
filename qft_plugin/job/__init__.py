"""One job from images to a trained network: what both hosts do in the same order."""
