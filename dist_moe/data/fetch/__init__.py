"""Files from packages, archives and addresses: downloaded once, checked, unpacked."""
