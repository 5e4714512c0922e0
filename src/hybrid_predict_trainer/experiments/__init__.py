"""What is run to find out whether prediction pays, and the page that shows it.

Reading order: `equal_loss` (the figure that is claimed), `arms` (one run of one arm), `compare`, `table`,
`single` (`hpt train`), `overhead`, `environment`, `report`.
"""
