"""From scores to statements: metrics with intervals, which rows pair up, differences, aggregates over seeds."""
