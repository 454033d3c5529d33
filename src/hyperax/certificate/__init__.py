"""Is this hypergradient right, of f_T or of f, and what does it cost?"""

from hyperax.certificate.certificate import Certificate, certify

__all__ = ["Certificate", "certify"]
