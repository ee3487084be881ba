"""Class-conditional generation of images: trained, sampled, measured."""
