"""Settings: schema, validation, and reading from YAML files and the command line."""

from mta.config.loader import Settings as Settings
from mta.config.schema import BankSettings as BankSettings
from mta.config.schema import CalibrationSettings as CalibrationSettings
from mta.config.schema import CompareSettings as CompareSettings
from mta.config.schema import Lora as Lora
from mta.config.schema import MergeSettings as MergeSettings
from mta.config.schema import Run as Run
from mta.config.schema import StackSettings as StackSettings
from mta.config.schema import TaskLoraSettings as TaskLoraSettings
from mta.config.schema import Training as Training
from mta.config.schema import override as override
from mta.config.schema import parse_size as parse_size
