"""The experiments of the paper, each with the controls that tell what is going on."""
