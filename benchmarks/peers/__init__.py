"""hyperax beside other libraries, on the same problems."""
