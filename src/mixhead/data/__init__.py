"""What is read: texts, sentence pairs, images, and the order in which a run reads them."""
