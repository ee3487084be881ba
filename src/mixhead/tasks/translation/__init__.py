"""Translation with attention experts: trained, used, scored."""
