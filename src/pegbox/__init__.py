"""pegbox: every published way to fine-tune a pre-trained model, behind one interface."""
