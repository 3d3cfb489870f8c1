"""Writes tickets.csv: 240 made-up messages to a shop, each with one of three
teams."""

import csv
import random

WHO = ['Hello,', 'Hi,', 'Good morning,', 'Please help,', 'Dear team,']
TEXTS = {
    'billing': [
        'I was charged twice for {}', 'the invoice for {} shows a wrong sum',
        'my refund for {} has not arrived on my account',
        'the discount for {} was not taken off the price',
        'which card did you charge for {}?'],
    'delivery': [
        'the parcel with {} has not come', '{} came to the wrong address',
        'the box of {} was open when the courier left it',
        'when will {} be at my door?', 'the tracking page of {} has stopped'],
    'repair': [
        '{} does not switch on any more', '{} makes a loud noise',
        'the screen of {} stays black', '{} gets hot and smells burnt',
        'a button of {} broke off on the first day'],
}
THINGS = ['the kettle', 'my radio', 'the printer', 'my new lamp', 'the mixer',
          'the heater', 'my camera', 'the scale']

random.seed(0)
rows = [(f'{who} {text.format(thing)}', team)
        for team, texts in TEXTS.items() for text in texts
        for thing in THINGS for who in random.sample(WHO, 2)]
random.shuffle(rows)
with open('tickets.csv', 'w', newline='') as file:
  csv.writer(file).writerows([('text', 'team'), *rows])
