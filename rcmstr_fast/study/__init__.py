"""Studies: many pretrainings x evaluations x seeds from one YAML file, and the pages that show what came out."""
