"""Reference data made at home: structures sampled, and labelled with energies and forces, in parallel processes."""
