"""Two small worlds in which the hidden concept is planted and the truth is known: `exact` needs no training, `trained` learns it."""
