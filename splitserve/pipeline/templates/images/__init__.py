"""From image files to a served release: VGG11 in PyTorch, served without PyTorch."""
