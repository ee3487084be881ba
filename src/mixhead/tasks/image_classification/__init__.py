"""Classifiers of images: trained, distilled, evaluated, looked at."""
