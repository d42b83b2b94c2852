"""The bookkeeping of one training: controller, settings, channels, norm windows, reports."""
