"""Weights on the host: files, parameter trees and the generated tiny model; never on a device."""
