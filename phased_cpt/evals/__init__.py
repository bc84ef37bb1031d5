"""What is measured on a model, whichever phase trains it. A hook computes and returns numbers; it logs nothing."""
