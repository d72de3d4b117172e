"""One lesson, from a folder of images to a saved model: open, learn, measure, commit."""
